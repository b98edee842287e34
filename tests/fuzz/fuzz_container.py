"""Fuzz target for the container, the header and the tensor sections, with atheris.

    pip install atheris
    python tests/fuzz/fuzz_container.py tests/fuzz/corpus -max_len=1200 -max_total_time=600

``tests/codec/test_fuzz_corpus.py`` runs the corpus and mutations of it on every test run, without atheris.
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["container_input", "hflfnerv.codec"]):
    from container_input import one_input

if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
