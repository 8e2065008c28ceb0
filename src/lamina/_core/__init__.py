"""The core: boxes, modules, the walker, binding, randomness and materialising. It knows no layer."""
