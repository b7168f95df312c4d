// A fault planted for LeakSanitizer: memory that nothing refers to any more.
#include <cstdio>

int main(int argc, char**) {
  auto* lost = new int[16];
  lost[argc] = argc;
  std::printf("%d\n", lost[argc]);
  lost = nullptr;
}
