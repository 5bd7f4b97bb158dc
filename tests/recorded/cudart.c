/* Stands in for CUDA's runtime library on a machine without a GPU: memory is the host's, and work is done at once.
   The calls are those that the agent makes, with the signatures of cuda_runtime_api.h. */
#include <stdlib.h>
#include <string.h>
#include <time.h>

int cudaSetDevice(int device) { return device != 0; }
int cudaStreamCreate(void **stream) { return !(*stream = malloc(1)); }
int cudaStreamSynchronize(void *stream) { return !stream; }
int cudaMalloc(void **memory, size_t size) { return !(*memory = malloc(size)); }
int cudaHostAlloc(void **memory, size_t size, unsigned flags) { return flags || !(*memory = malloc(size)); }
int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream)
{
    return kind < 1 || kind > 2 || !stream || !memcpy(to, from, size);
}
int cudaEventCreate(void **event) { return !(*event = malloc(sizeof(struct timespec))); }
int cudaEventRecord(void *event, void *stream) { return !stream || clock_gettime(CLOCK_MONOTONIC, event); }
int cudaEventElapsedTime(float *milliseconds, void *start, void *end)
{
    struct timespec *a = start, *b = end;
    *milliseconds = (b->tv_sec - a->tv_sec) * 1e3f + (b->tv_nsec - a->tv_nsec) / 1e6f;
    return 0;
}
int cudaDeviceGetAttribute(int *value, int attribute, int device)
{
    const char *given = getenv("CUDART_INTEGRATED");
    *value = attribute == 18 && given ? atoi(given) : 0; /* cudaDevAttrIntegrated */
    return device != 0;
}
const char *cudaGetErrorString(int status) { return status ? "invalid argument" : "no error"; }
