"""Loaded by run.sh with pytest's -p, before anything imports megatron-core, which imports transformer-engine."""

from tests.transformer_engine.kernels import prepare

prepare()
