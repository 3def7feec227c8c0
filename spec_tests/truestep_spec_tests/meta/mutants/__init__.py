"""Mistakes that someone could make in the optimized code, as small patches."""

from truestep_spec_tests.meta.mutants import bema, log_completions, ref_sync, rich_progress, weave_eval

MUTANTS = (*bema.MUTANTS, *ref_sync.MUTANTS, *log_completions.MUTANTS, *weave_eval.MUTANTS, *rich_progress.MUTANTS)
"""All mutants."""
