// delta (B, H, L) = sum over the width of grad result - shift: what the backward pass of attention
// takes off each row of grad v^T. A warp a row; any strides, all element types.
//
// Defined in front: ELEMENT, SHIFT (1: there is a shift, the gradient of log_sum), WARPS. grad and
// result are (B, H, L, Ev), shift and delta (B, H, L) contiguous, float32 (float64 for float64).
#include "numbers.cuh"

extern "C" __global__ void __launch_bounds__(WARPS * 32) attention_delta(
    const Element* grad, const Element* result,
#if SHIFT
    const Wide* shift,
#endif
    Wide* delta, i64 rows, i64 heads, i64 length, i64 width, i64 grad_batch, i64 grad_head,
    i64 grad_row, i64 grad_column, i64 result_batch, i64 result_head, i64 result_row,
    i64 result_column) {
  const i64 number = (i64)blockIdx.x * WARPS + threadIdx.x / 32;
  const int lane = (int)(threadIdx.x % 32);
  if (number >= rows) return;
  const i64 row = number % length, head = number / length % heads, batch = number / length / heads;
  const Element* left = grad + batch * grad_batch + head * grad_head + row * grad_row;
  const Element* right = result + batch * result_batch + head * result_head + row * result_row;
  Wide sum = 0;
  for (int i = lane; i < width; i += 32)
    sum += load_element(left + i * grad_column) * load_element(right + i * result_column);
#pragma unroll
  for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
#if SHIFT
  sum -= shift[number];
#endif
  if (lane == 0) delta[number] = sum;
}
