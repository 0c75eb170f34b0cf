"""The state of a run and the folder it is kept in."""
