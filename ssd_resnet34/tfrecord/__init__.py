"""SSD300-ResNet34 from TFRecord files, with a cosine schedule.

There are two recipes, each after a port of MLPerf's SSD to Ascend NPUs. In this folder they are
called

* the COCO recipe, in the folder above this one: it follows the PyTorch port, of NVIDIA's SSD in
  MLPerf v0.7;
* the TFRecord recipe, in this folder: it follows the TensorFlow port, of Google's SSD in MLPerf
  v0.6.

The files are those of a model folder. Pure functions and the backbone, which both recipes have in
common, are imported from `ssd_resnet34`.
"""
