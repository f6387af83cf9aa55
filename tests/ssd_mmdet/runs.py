"""Small runs of the real scripts, for the end-to-end tests."""

from tests import scripts

MODEL = scripts.ROOT / "ssd_mmdet"
# A thin network and few images: a step takes a fraction of a second.
THIN = ("--width=0.0625", "--device=cpu", "--amp=O0")
SMALL = (*THIN, "--batch_size=2", "--repeat=1")


def place(script):
    folder = MODEL / "test" if script.endswith(".sh") else MODEL
    return str(folder / script)


def run(script, *flags, **options):
    return scripts.run(place(script), *flags, **options)


def running(script, *flags, **options):
    return scripts.running(place(script), *flags, **options)
