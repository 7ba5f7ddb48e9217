/* A driver with GPUs that STUB_GPUS names by one letter each, in CUDA's order. A UUID is the letter sixteen times.
 * Compute capability is 8.0, and one minor more for each letter after 'a'. It serves the CUDA of STUB_CUDA. */
#include <stdlib.h>
#include <string.h>

static const char *gpus(void) { const char *said = getenv("STUB_GPUS"); return said ? said : "a"; }
int cuInit(unsigned flags) { (void)flags; return *gpus() ? 0 : 100; }
int cuDriverGetVersion(int *version) {
    const char *said = getenv("STUB_CUDA");
    *version = said ? atoi(said) : 13020;
    return 0;
}
int cuGetErrorName(int code, const char **name) { *name = code == 100 ? "CUDA_ERROR_NO_DEVICE" : 0; return code != 100; }
int cuDeviceGetCount(int *count) { *count = (int)strlen(gpus()); return 0; }
int cuDeviceGet(int *device, int number) {
    if (number < 0 || number >= (int)strlen(gpus())) return 101;
    *device = number;
    return 0;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    if (attribute != 75 && attribute != 76) return 1;
    *value = attribute == 75 ? 8 : gpus()[device] - 'a';
    return 0;
}
int cuTensorMapEncodeTiled(void) { return 1; } /* what ONNX Runtime's library wants to find */
int cuDeviceGetUuid_v2(unsigned char *uuid, int device) { memset(uuid, gpus()[device], 16); return 0; }
