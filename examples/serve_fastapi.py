"""A small service that takes a photograph and returns its vector and its label.

    pip install fastapi uvicorn
    python examples/serve_fastapi.py                                        labels: the example photographs
    python examples/serve_fastapi.py --labelled labelled/ -m dino_vits16    a folder a class

    curl --data-binary @photo.jpg -H 'content-type: image/jpeg' http://127.0.0.1:8000/photo

answers {"label": "cat", "probability": 0.93, "vector": [...], "model": "starter", "weights_sha256": "…"}. What is no
picture is answered with 422 and the reason, more than 20 MB with 413. http://127.0.0.1:8000/docs describes it.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Annotated, Any

from crops import write_crops
from fastapi import Body, FastAPI, HTTPException

from dinokit import KNNClassifier, load_backbone
from dinokit.classifiers.labelled import find_labelled
from dinokit.errors import ImageError

MOST_BYTES = 20_000_000


def create_app(model: str = "starter", labelled: Path | None = None) -> FastAPI:
    """The service. The model is loaded and the examples are embedded once, before the first request."""
    backbone = load_backbone(model)
    with tempfile.TemporaryDirectory() as made:
        examples = find_labelled(labelled or write_crops(Path(made))[0])
        knn = KNNClassifier().fit(backbone.embed(examples.paths), examples.labels)
    app = FastAPI(title="dinokit", description=f"Vectors and labels by {backbone.name}.")

    # A plain function: FastAPI runs it in a thread, and requests are answered side by side.
    @app.post("/photo")
    def photo(data: Annotated[bytes, Body(media_type="application/octet-stream")]) -> dict[str, Any]:
        """The body is the picture file itself: JPEG, PNG, WebP …"""
        if len(data) > MOST_BYTES:
            raise HTTPException(413, f"the picture has {len(data)} bytes; at most {MOST_BYTES} are taken")
        try:
            vector = backbone.embed(data)
        except ImageError as error:
            raise HTTPException(422, str(error)) from error
        shares = knn.predict_proba(vector[None])[0]
        return {
            "label": str(knn.classes_[shares.argmax()]),
            "probability": float(shares.max()),
            "vector": vector.tolist(),
            "model": backbone.name,
            "weights_sha256": backbone.weights_sha256,
        }

    return app


def main() -> None:
    import uvicorn

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-m", "--model", default="starter")
    parser.add_argument("--labelled", type=Path, help="a folder with one subfolder per class")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    uvicorn.run(create_app(args.model, args.labelled), host=args.host, port=args.port)


if __name__ == "__main__":
    main()
