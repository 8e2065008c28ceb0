"""The core: boxes, modules, the walker, binding and materialising. It knows no layer."""
