"""Packing: which prompt tokens' KV a decode worker gets, and in what form.

`recipes`, `budget` and `layout` import without torch, for the router and for admission. The rest is tensor work.
"""
