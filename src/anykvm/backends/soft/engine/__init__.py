"""The CPU engine adapter: C, loaded as ``libanykvm_engine.so`` beside this file; ``library`` knows its functions."""
