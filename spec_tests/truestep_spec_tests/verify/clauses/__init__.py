"""`truestep verify --clauses`: what SPEC.md says, clause by clause, of any implementation."""
