// Marks functions that the host's and the device's compiler both compile.
#pragma once

#ifdef __CUDACC__
#define SYNFACE_HOST_DEVICE __host__ __device__
#else
#define SYNFACE_HOST_DEVICE
#endif
