"""Does it still detect: mmdet with our networks as backbones, training, AP, and pruning of detectors themselves.

Importing this needs none of the optional packages; `detection/openmm.py` alone imports mmdet.
"""
