"""SSD300-ResNet34, second recipe: TFRecord input and a cosine schedule, after a TensorFlow job.

The rooms are those of a model folder; what the two recipes share is imported from `ssd_resnet34`.
"""
