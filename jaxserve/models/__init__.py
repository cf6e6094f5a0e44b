"""Model definitions: one decoder, a spec of what it is made of, and a name table per family."""
