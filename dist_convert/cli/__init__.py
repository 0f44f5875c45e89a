"""The command line: flags, job files, and the records that they become."""
