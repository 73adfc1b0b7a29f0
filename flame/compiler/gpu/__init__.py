"""Operations and whole steps on a GPU: kernels and library calls in order, on one stream.

`steps` makes what a lowering asks for ready to launch, `call` runs one operation of eager
execution, `program` a whole step as one CUDA graph.
"""
