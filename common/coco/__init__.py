"""COCO data: annotations, images, evaluation, pictures, the built-in sample set."""
