"""SSD300-ResNet34, second recipe: TFRecord input and a cosine schedule, after a TensorFlow job.

The files are those of a model folder. Pure functions and the backbone that the two recipes have in
common are imported from `ssd_resnet34`.
"""
