"""The suite that holds an implementation of the callbacks against SPEC.md."""
