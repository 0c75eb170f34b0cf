"""A small service that takes a photograph and returns its vector and its label.

    pip install fastapi uvicorn
    python examples/serve_fastapi.py                                        the example photographs as labels
    python examples/serve_fastapi.py --labelled labelled/ -m dino_vits16    one subfolder per class

    curl --data-binary @photo.jpg -H 'content-type: image/jpeg' http://127.0.0.1:8000/photo

answers {"label": "cat", "probability": 0.93, "vector": [...], "model": "starter", "weights_sha256": "…"}. The answer to
an unreadable picture is 422 with the reason, to more than 20 MB 413. http://127.0.0.1:8000/docs describes the service.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Annotated, Any

from crops import write_crops
from fastapi import Depends, FastAPI, HTTPException, Request

from dinokit import KNNClassifier, load_backbone, read_embeddings
from dinokit.classifiers.labelled import find_labelled
from dinokit.errors import ImageError
from dinokit.tables.run import embed_to_table

MOST_BYTES = 20_000_000
BODY = {
    "required": True,
    "content": {"image/*": {"schema": {"type": "string", "format": "binary"}}},
}  # for /docs


async def picture_in(request: Request) -> bytes:
    """The body of a request; one that is too large is refused before more than ``MOST_BYTES`` are in memory."""
    refusal = HTTPException(413, f"the picture is too large; send at most {MOST_BYTES} bytes")
    if int(request.headers.get("content-length", 0)) > MOST_BYTES:
        raise refusal
    data = bytearray()
    async for chunk in request.stream():  # the stated length may be missing
        data += chunk
        if len(data) > MOST_BYTES:
            raise refusal
    return bytes(data)


def create_app(model: str = "starter", labelled: Path | None = None) -> FastAPI:
    """The service. Loads the model and embeds the examples once, before the first request."""
    backbone = load_backbone(model)
    with tempfile.TemporaryDirectory() as made:
        examples = find_labelled(labelled or write_crops(Path(made))[0])
        embed_to_table(examples.paths, Path(made) / "examples.parquet", backbone)
        table = read_embeddings(Path(made) / "examples.parquet")
    for path, error in zip(table.paths, table.errors, strict=True):
        if error is not None:
            print(f"left out: {path}: {error}")
    rows = [row for row, error in enumerate(table.errors) if error is None]
    knn = KNNClassifier().fit(table.embeddings[rows], [examples.labels[row] for row in rows])
    app = FastAPI(title="dinokit", description=f"Vectors and labels by {backbone.name}.")

    # Not async: FastAPI runs it in a thread, so that requests are answered concurrently.
    @app.post("/photo", openapi_extra={"requestBody": BODY})
    def photo(data: Annotated[bytes, Depends(picture_in)]) -> dict[str, Any]:
        """The body is the picture file itself: JPEG, PNG, WebP …"""
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
