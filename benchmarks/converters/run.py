"""Optimize, with training, networks that other libraries trained and their own converters exported.

    pip install '.[train,openvino]' scikit-learn skl2onnx keras
    python benchmarks/converters/run.py [--library scikit-learn|keras] [--budget 6m]

Writes results-LIBRARY.json and README's table.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from hasten.host import versions
from hasten.plan import Plan

os.environ["KERAS_BACKEND"] = "torch"
HERE = Path(__file__).parent
BEGIN, END = "<!-- results -->", "<!-- end of results -->"
TRAINED = 1000
"""Digits that networks are trained on, of 1,797; the others judge."""


def digits(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Give scikit-learn's handwritten digits, float32 [1797, *shape] in 0..1, shuffled, and their classes."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    return (found.data[order] / 16).astype(np.float32).reshape(-1, *shape), found.target[order].astype(np.int64)


def perceptron(path: Path) -> tuple[str, tuple[int, ...]]:
    """Train scikit-learn's MLPClassifier, and export it with skl2onnx."""
    from skl2onnx import to_onnx
    from sklearn.neural_network import MLPClassifier

    x, y = digits((64,))
    network = MLPClassifier((512, 512), max_iter=30, random_state=0).fit(x[:TRAINED], y[:TRAINED])
    path.write_bytes(to_onnx(network, x[:1], options={"zipmap": False}).SerializeToString())
    return "X", (64,)


def convolutions(path: Path) -> tuple[str, tuple[int, ...]]:
    """Train a convolutional network in Keras, and export it with ``model.export``."""
    import keras

    keras.utils.set_random_seed(0)
    x, y = digits((8, 8, 1))
    layers = keras.layers
    inputs = h = keras.Input((8, 8, 1), name="image")
    for width, stride in ((32, 1), (64, 2), (64, 1)):
        h = layers.Conv2D(width, 3, strides=stride, padding="same", use_bias=False)(h)
        h = layers.ReLU()(layers.BatchNormalization(momentum=0.9)(h))
    network = keras.Model(inputs, layers.Dense(10, activation="softmax")(layers.GlobalAveragePooling2D()(h)))
    network.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    network.fit(x[:TRAINED], y[:TRAINED], batch_size=32, epochs=12, verbose=2)
    network.export(str(path), format="onnx", verbose=False)
    return "image", (8, 8, 1)


LIBRARIES: dict[str, Callable[[Path], tuple[str, tuple[int, ...]]]] = {
    "scikit-learn": perceptron,
    "keras": convolutions,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", choices=sorted(LIBRARIES), default="scikit-learn")
    parser.add_argument("--budget", default="6m")
    parser.add_argument("--keep", type=Path, help="folder for model, samples and search; the same folder resumes it")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        return one(asked, (asked.keep or Path(scratch)).absolute())


def one(asked: argparse.Namespace, folder: Path) -> int:
    """Train, export, and run the command as a user would."""
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / f"{asked.library}.onnx"
    if not model.exists():
        name, shape = LIBRARIES[asked.library](model)
        x, y = digits(shape)
        np.savez(folder / "train.npz", **{name: x[:TRAINED], "label": y[:TRAINED]})
        np.savez(folder / "test.npz", **{name: x[TRAINED:], "label": y[TRAINED:]})
    command = [sys.executable, "-m", "hasten", "optimize", str(model), "--data", str(folder / "test.npz")]
    command += ["--train", str(folder / "train.npz"), "--max-drop", "2%", "--budget", asked.budget, "--threads", "1"]
    command += ["--epochs", "200", "--home", str(folder / "home"), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if done.returncode not in (0, 3):
        return done.returncode
    record = describe(msgspec.json.decode(done.stdout)) | {"library": asked.library, "versions": versions()}
    path = HERE / f"results-{asked.library}.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(record)))
    write_tables()
    print(record["verdict"])
    return done.returncode


def describe(result) -> dict:
    """Give what is claimed: the verdict, and every plan that was trained, with what it lost and gained."""
    chosen = next(item for item in result["certificates"] if item["plan"] == result["chosen"])
    plans = []
    for trial in result["trials"]:
        names = [part["name"] for part in trial["plan"]["passes"]]
        if trial["stage"] == "compress" and trial["outcome"] == "measured":
            measured = trial["measurement"]
            plans.append(
                {
                    "passes": names,
                    "engine": trial["plan"]["engine"],
                    "speedup": measured["speedup"],
                    "drop": measured["quality"]["drop"],
                }
            )
    return {
        "verdict": result["verdict"],
        "chosen": next(trial["plan"] for trial in result["trials"] if key_of(trial["plan"]) == result["chosen"]),
        "over_original": chosen["over_original"],
        "quality": chosen["quality"],
        "seconds": result["seconds"],
        "trials": len(result["trials"]),
        "trained": plans,
        "conditions": result["conditions"],
    }


def key_of(plan) -> str:
    return msgspec.convert(plan, Plan).key


def write_tables() -> None:
    """Write every record into the README, between its markers."""
    page = HERE / "README.md"
    head, _, rest = page.read_text().partition(BEGIN)
    lines = []
    for path in sorted(HERE.glob("results-*.json")):
        record = msgspec.json.decode(path.read_bytes())
        over, quality = record["over_original"], record["quality"]
        lines += [
            f"### {record['library']}: {record['verdict']['word']}",
            "",
            f"{record['verdict']['sentence']}. {record['trials']} plans in {record['seconds'] / 60:.0f} minutes; "
            f"chosen: {steps(record['chosen']['passes'])}, "
            f"{over['value']:.2f}x [{over['low']:.2f}, {over['high']:.2f}].",
            "",
            "| plans of the stage that trains | speed-up | drop on the search split |",
            "|---|---|---|",
            *(
                f"| {' > '.join(item['passes'])} | {item['speedup']['value']:.2f} | {item['drop']['value']:.2%} |"
                for item in record["trained"]
            ),
            "",
            "" if quality is None else f"Accuracy {quality['reference']:.2%} before, {quality['value']:.2%} after.",
            "",
        ]
    page.write_text(head + BEGIN + "\n" + "\n".join(lines) + END + rest.partition(END)[2])


def steps(passes) -> str:
    return " > ".join(part["name"] for part in passes) or "the untouched model"


if __name__ == "__main__":
    raise SystemExit(main())
