"""A model as a file for the runtime that it will run in, verified there before it is called done."""
