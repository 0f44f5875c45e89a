"""A stand-in for Intel's package, for tests without Gaudi: see the README beside it."""
