// A fault planted for AddressSanitizer: a read of the element after a buffer's last.
#include <cstdio>

#include "common/memory.h"

int main(int argc, char**) {
  const synface::Buffer<float> buffer(16 * argc);
  for (int i = 0; i < 16 * argc; ++i) buffer[i] = float(i);
  std::printf("%f\n", double(buffer[16 * argc]));
}
