"""Mistakes that someone could make in the optimized code, as small patches."""

from truestep_spec_tests.meta.mutants import bema, log_completions, ref_sync, weave_eval

MUTANTS = (*bema.MUTANTS, *ref_sync.MUTANTS, *log_completions.MUTANTS, *weave_eval.MUTANTS)
"""All mutants."""
