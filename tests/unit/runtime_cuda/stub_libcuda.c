// A libcuda.so.1 on host memory, for `flame.runtime.cuda.nvidia` on machines without a GPU: every
// call checks what it can of its arguments, and does at once what the driver would queue.
#include <cuda.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define STUB(name, ...) CUresult stub_##name(__VA_ARGS__)

static size_t next_handle = 0x1000;
#define MAKE(target) (*(target) = (void *)(next_handle += 16), CUDA_SUCCESS)

static __thread size_t current;  // context of this thread; that of device d is 0x100 + d
static size_t capturing;
static size_t plain_allocations;

STUB(cuInit, unsigned flags) { return flags ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS; }
STUB(cuDriverGetVersion, int *version) { *version = 13000; return CUDA_SUCCESS; }
STUB(cuDeviceGetCount, int *count) { *count = 2; return CUDA_SUCCESS; }
STUB(cuDeviceGet, CUdevice *device, int number) {
  *device = number;
  return number < 2 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}
STUB(cuDeviceGetName, char *name, int length, CUdevice device) {
  snprintf(name, length, "Stub %d", device);
  return CUDA_SUCCESS;
}
STUB(cuDeviceTotalMem, size_t *nbytes, CUdevice device) { *nbytes = 80ull << 30; return CUDA_SUCCESS; }
STUB(cuDeviceGetAttribute, int *value, CUdevice_attribute which, CUdevice device) {
  switch (which) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 232448; break;
    case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE: *value = 50 << 20; break;
    case CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED: *value = 1; break;
    default: return CUDA_ERROR_INVALID_VALUE;
  }
  return CUDA_SUCCESS;
}
STUB(cuDevicePrimaryCtxRetain, CUcontext *context, CUdevice device) {
  *context = (CUcontext)(0x100 + (size_t)device);
  return CUDA_SUCCESS;
}
STUB(cuCtxSetCurrent, CUcontext context) { current = (size_t)context; return CUDA_SUCCESS; }
STUB(cuCtxGetCurrent, CUcontext *context) { *context = (CUcontext)current; return CUDA_SUCCESS; }
STUB(cuCtxSynchronize, void) { return current ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT; }

STUB(cuDeviceGetDefaultMemPool, CUmemoryPool *pool, CUdevice device) {
  *pool = (CUmemoryPool)(0x200 + (size_t)device);
  return CUDA_SUCCESS;
}
static unsigned long long threshold;
STUB(cuMemPoolSetAttribute, CUmemoryPool pool, CUmemPool_attribute which, void *value) {
  if (which != CU_MEMPOOL_ATTR_RELEASE_THRESHOLD) return CUDA_ERROR_INVALID_VALUE;
  threshold = *(cuuint64_t *)value;
  return CUDA_SUCCESS;
}
STUB(cuMemPoolGetAttribute, CUmemoryPool pool, CUmemPool_attribute which, void *value) {
  if (which != CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT) return CUDA_ERROR_INVALID_VALUE;
  *(cuuint64_t *)value = threshold == ~0ull ? 12345 : 0;
  return CUDA_SUCCESS;
}
STUB(cuMemPoolTrimTo, CUmemoryPool pool, size_t kept) { return kept ? CUDA_ERROR_INVALID_VALUE : 0; }
STUB(cuMemAllocAsync, CUdeviceptr *pointer, size_t nbytes, CUstream stream) {
  if (!nbytes || !stream || !current) return CUDA_ERROR_INVALID_VALUE;
  if (nbytes > (1ull << 32)) return CUDA_ERROR_OUT_OF_MEMORY;
  *pointer = (CUdeviceptr)aligned_alloc(256, (nbytes + 255) / 256 * 256);
  return CUDA_SUCCESS;
}
STUB(cuMemFreeAsync, CUdeviceptr pointer, CUstream stream) {
  if (!stream) return CUDA_ERROR_INVALID_VALUE;
  free((void *)pointer);
  return CUDA_SUCCESS;
}
STUB(cuMemAlloc, CUdeviceptr *pointer, size_t nbytes) {
  plain_allocations++;
  return stub_cuMemAllocAsync(pointer, nbytes, (CUstream)1);
}
STUB(cuMemFree, CUdeviceptr pointer) { return stub_cuMemFreeAsync(pointer, (CUstream)1); }
STUB(cuMemGetInfo, size_t *unused, size_t *total) {
  *unused = (64ull << 30) + plain_allocations;
  *total = 80ull << 30;
  return current ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}
STUB(cuMemHostAlloc, void **pointer, size_t nbytes, unsigned flags) {
  if (!current || flags != (CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP))
    return CUDA_ERROR_INVALID_VALUE;
  *pointer = aligned_alloc(4096, (nbytes + 4095) / 4096 * 4096);
  return CUDA_SUCCESS;
}
STUB(cuMemFreeHost, void *pointer) { free(pointer); return CUDA_SUCCESS; }
STUB(cuMemcpyHtoDAsync, CUdeviceptr to, const void *of, size_t nbytes, CUstream stream) {
  memcpy((void *)to, of, nbytes);
  return CUDA_SUCCESS;
}
STUB(cuMemcpyDtoHAsync, void *to, CUdeviceptr of, size_t nbytes, CUstream stream) {
  memcpy(to, (void *)of, nbytes);
  return CUDA_SUCCESS;
}
STUB(cuMemcpyDtoDAsync, CUdeviceptr to, CUdeviceptr of, size_t nbytes, CUstream stream) {
  memmove((void *)to, (void *)of, nbytes);
  return CUDA_SUCCESS;
}
STUB(cuMemcpyPeerAsync, CUdeviceptr to, CUcontext there, CUdeviceptr of, CUcontext here,
     size_t nbytes, CUstream stream) {
  if ((size_t)there != 0x101 || (size_t)here != 0x100) return CUDA_ERROR_INVALID_CONTEXT;
  memcpy((void *)to, (void *)of, nbytes);
  return CUDA_SUCCESS;
}
STUB(cuMemsetD8Async, CUdeviceptr to, unsigned char byte, size_t nbytes, CUstream stream) {
  memset((void *)to, byte, nbytes);
  return CUDA_SUCCESS;
}

STUB(cuStreamCreateWithPriority, CUstream *stream, unsigned flags, int priority) {
  if (!current || flags != CU_STREAM_NON_BLOCKING || priority > 0) return CUDA_ERROR_INVALID_VALUE;
  return MAKE((void **)stream);
}
STUB(cuStreamDestroy, CUstream stream) { return CUDA_SUCCESS; }
STUB(cuStreamSynchronize, CUstream stream) {
  return (size_t)stream == capturing ? CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED : CUDA_SUCCESS;
}
STUB(cuStreamQuery, CUstream stream) {  // not ready the first time
  static int asked;
  return asked++ ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}
STUB(cuEventCreate, CUevent *event, unsigned flags) {
  MAKE((void **)event);
  if (flags == CU_EVENT_DEFAULT) *event = (CUevent)(next_handle += 8);  // timed: an odd eighth
  else if (flags != CU_EVENT_DISABLE_TIMING) return CUDA_ERROR_INVALID_VALUE;
  return CUDA_SUCCESS;
}
STUB(cuEventDestroy, CUevent event) { return event ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE; }
STUB(cuEventRecord, CUevent event, CUstream stream) { return CUDA_SUCCESS; }
STUB(cuStreamWaitEvent, CUstream stream, CUevent event, unsigned flags) { return CUDA_SUCCESS; }
STUB(cuEventSynchronize, CUevent event) { return CUDA_SUCCESS; }
STUB(cuEventQuery, CUevent event) { return CUDA_SUCCESS; }
STUB(cuEventElapsedTime, float *milliseconds, CUevent begin, CUevent end) {
  *milliseconds = 1.5f;
  return (size_t)begin % 16 == 8 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

STUB(cuModuleLoadData, CUmodule *module, const void *image) {
  if (!current || memcmp(image, "\177ELF", 4)) return CUDA_ERROR_INVALID_IMAGE;
  return MAKE((void **)module);
}
STUB(cuModuleGetFunction, CUfunction *function, CUmodule module, const char *name) {
  if (strcmp(name, "add") && strcmp(name, "fault")) return CUDA_ERROR_NOT_FOUND;
  *function = (CUfunction)(size_t)(*name == 'a' ? 0xadd0 : 0xfa10);
  return CUDA_SUCCESS;
}
static int most_shared = 48 << 10;
STUB(cuFuncSetAttribute, CUfunction function, CUfunction_attribute which, int value) {
  if (which != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES || value > 232448)
    return CUDA_ERROR_INVALID_VALUE;
  most_shared = value;
  return CUDA_SUCCESS;
}
STUB(cuFuncGetParamInfo, CUfunction function, size_t index, size_t *offset, size_t *size) {
  if (index > 2) return CUDA_ERROR_INVALID_VALUE;
  *offset = 8 * index;
  *size = index == 2 ? 4 : 8;
  return CUDA_SUCCESS;
}
// add(const float* x, float* y, float a): y[i] = x[i] + a for all threads of the grid.
STUB(cuLaunchKernel, CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
     unsigned by, unsigned bz, unsigned shared, CUstream stream, void **arguments, void **extra) {
  if ((size_t)function == 0xfa10) return CUDA_ERROR_ILLEGAL_ADDRESS;
  if ((size_t)function != 0xadd0 || bx * by * bz > 1024 || (int)shared > most_shared || extra)
    return CUDA_ERROR_INVALID_VALUE;
  const float *x = *(const float **)arguments[0];
  float *y = *(float **)arguments[1], a = *(float *)arguments[2];
  for (unsigned i = 0; i < gx * gy * gz * bx * by * bz; i++) y[i] = x[i] + a;
  return CUDA_SUCCESS;
}

STUB(cuStreamBeginCapture, CUstream stream, CUstreamCaptureMode mode) {
  if (mode != CU_STREAM_CAPTURE_MODE_THREAD_LOCAL) return CUDA_ERROR_INVALID_VALUE;
  capturing = (size_t)stream;
  return CUDA_SUCCESS;
}
STUB(cuStreamEndCapture, CUstream stream, CUgraph *graph) {
  if ((size_t)stream != capturing) return CUDA_ERROR_ILLEGAL_STATE;
  capturing = 0;
  return MAKE((void **)graph);
}
static int graphs;
STUB(cuGraphInstantiate, CUgraphExec *made, CUgraph graph, unsigned long long flags) {
  graphs++;
  return MAKE((void **)made);
}
STUB(cuGraphInstantiateWithFlags, CUgraphExec *made, CUgraph graph, unsigned long long flags) {
  return stub_cuGraphInstantiate(made, graph, flags);
}
STUB(cuGraphUpload, CUgraphExec graph, CUstream stream) { return CUDA_SUCCESS; }
STUB(cuGraphLaunch, CUgraphExec graph, CUstream stream) {
  return graphs ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}
STUB(cuGraphExecDestroy, CUgraphExec graph) { graphs--; return CUDA_SUCCESS; }
STUB(cuGraphDestroy, CUgraph graph) { return CUDA_SUCCESS; }
STUB(cuGetErrorString, CUresult status, const char **words) { *words = "in words"; return CUDA_SUCCESS; }

CUresult cuInit(unsigned flags) { return stub_cuInit(flags); }
CUresult cuGetProcAddress_v2(const char *name, void **function, int version, cuuint64_t flags,
                             CUdriverProcAddressQueryResult *found) {
  char stub[200];
  snprintf(stub, sizeof stub, "stub_%s", name);
  void *self = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
  *function = strcmp(name, "cuGetProcAddress") ? dlsym(self, stub) : (void *)cuGetProcAddress_v2;
  if (found)
    *found = *function ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
