"""The vocabulary every other package speaks: types, errors, configuration, hashing. Imports nothing of ours."""
