"""The suite's ways of looking, each asked for a verdict on a package that claims to be right."""
