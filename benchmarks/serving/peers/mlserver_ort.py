"""A model of MLServer that runs ONNX Runtime: what its documentation asks one to write for a runtime of one's own."""

import numpy as np
import onnxruntime
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class OnnxModel(MLModel):
    async def load(self) -> bool:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        path = self.settings.parameters.uri
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._feed = self._session.get_inputs()[0].name
        self._wanted = [self._session.get_outputs()[0].name]
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        x = NumpyCodec.decode_input(payload.inputs[0]).astype(np.float32)
        (y,) = self._session.run(self._wanted, {self._feed: x})
        output = NumpyCodec.encode_output(self._wanted[0], y)
        return InferenceResponse(model_name=self.name, outputs=[output])
