// A fault planted for ThreadSanitizer: two threads write one number.
#include <cstdio>
#include <thread>

int main() {
  int number = 0;
  std::thread other([&] { ++number; });
  ++number;
  other.join();
  std::printf("%d\n", number);
}
