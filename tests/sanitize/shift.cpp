// A fault planted for UndefinedBehaviorSanitizer: a shift by the width of the type.
#include <cstdio>

int main(int argc, char**) { std::printf("%d\n", argc << (31 + argc)); }
