"""The program that wrote train.rec, train.idx and property here, with MXNet 1.9.1 and NumPy 1.23.

They have the layout of insightface's sets: six images of two identities, some with two labels, and
two with RecordIO's magic number among their bytes.

    python write.py FOLDER
"""

import io
import struct
import sys
from pathlib import Path

import mxnet as mx
import numpy as np
from PIL import Image

MAGIC = struct.pack("<I", 0xCED7230A)
folder = Path(sys.argv[1])
pack, Header = mx.recordio.pack, mx.recordio.IRHeader
rec = mx.recordio.MXIndexedRecordIO(str(folder / "train.idx"), str(folder / "train.rec"), "w")
rec.write_idx(0, pack(Header(2, [7, 9], 0, 0), b""))
for i in range(6):
    file = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), 40 * i, np.uint8)).save(file, "PNG")
    content = file.getvalue()
    if times := {2: 1, 5: 3}.get(i):  # the magic number at a multiple of 4
        content += bytes(-len(content) % 4) + MAGIC * times + b"end"
    label = float(i // 3) if i % 2 else [float(i // 3), 0.5]
    rec.write_idx(i + 1, pack(Header(0 if i % 2 else 2, label, i + 1, 0), content))
for p in range(2):
    rec.write_idx(7 + p, pack(Header(2, [1 + 3 * p, 4 + 3 * p], 7 + p, 0), b""))
rec.close()
(folder / "property").write_text("2,4,4")
