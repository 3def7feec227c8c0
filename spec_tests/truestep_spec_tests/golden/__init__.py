"""`truestep fixtures`: exact expected results as data, for implementations in any language or framework.

The files, and what is in them, are described in `truestep_fixtures/golden/README.md`.
"""
