"""Mistakes that someone could make in the optimized code, as small patches."""

from truestep_spec_tests.meta.mutants import bema, ref_sync

MUTANTS = (*bema.MUTANTS, *ref_sync.MUTANTS)
"""All mutants."""
