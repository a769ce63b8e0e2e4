"""Gives trained networks to other programs, as ONNX and safetensors, each file checked before it is put in place."""
