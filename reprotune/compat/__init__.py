"""Replaced functions, private overrides and flags of libraries: one module a library, one function each.

Each docstring gives the reason and the version it was seen with; tests/compat fails where a new version
changes either. `lazy_imports` skips imports that scoring never uses.
"""
