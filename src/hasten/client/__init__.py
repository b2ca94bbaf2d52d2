"""Calling any Open Inference Protocol server, blocking or with asyncio, over REST or gRPC.

``calls`` says what each call sends and how its answer is read, and knows no socket; ``http``, ``http_async``, ``grpc``
and ``grpc_async`` carry it; ``client`` is the face of both.
"""
