"""The command line `pqcad`: each command is a file, thin over the library."""
