"""Memory before anything runs; compiling for a GPU that is not there."""
