"""The clauses of SPEC.md, as the tests of the suite find that an implementation holds them."""
