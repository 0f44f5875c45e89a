"""Turns headers into box copies and deals them to ranks: integers and strings only."""
