"""Slow references of published packing methods, one small file per method, written from the papers.

They share no code with `packlight.compress`, work on plain lists in double precision, and prefer being obvious to being
fast. `record_kvpress.py` makes the recorded comparison beside them (tests/fixtures/kvpress).
"""
