"""Codecs: the forms in which head pages travel."""
