"""Triton kernels, one module per operation: the kernels, then their launchers, and nothing else.

What several of them use is in modules whose names begin with an underscore; they import nothing else of the package.

Installed as ``hflfnerv.triton_kernels``. The launchers take tensors that :mod:`hflfnerv.ops` has checked and laid out;
they allocate the results and pick the tile. Only plain ``triton.language`` is used, so that Triton 3.5 to 3.9 compile
it, and floating-point fusion is asked for in each launch, since its default differs between those versions.
"""
