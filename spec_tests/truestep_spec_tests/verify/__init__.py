"""`truestep verify`: whether an implementation does what SPEC.md says, as an installed program finds out."""
