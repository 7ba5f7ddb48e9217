"""Does it still detect: a pruned backbone in an object detector.

Empty in this version. Planned: MMDetection integration (the pruned model as a backbone, training, COCO evaluation),
with one file here that imports mmdet, mmcv and mmengine. Until then the package holds the place in the import order
(`deploy` > `detection` > `toolchain` > `calib_data`) and the `[detection]` extra names the versions known to work.
"""
