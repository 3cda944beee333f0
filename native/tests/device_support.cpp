#include "device_support.hpp"

#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <exception>
#include <iterator>
#include <system_error>

namespace fc::testing {

std::string in_child(const std::function<std::string()>& work) {
  int ends[2];
  if (pipe(ends) != 0) return "no pipe";
  const pid_t child = fork();
  if (child < 0) return "no child";
  if (child == 0) {
    close(ends[0]);
    std::string answer;
    try {
      answer = work();
    } catch (const std::exception& error) {
      answer = std::string("threw: ") + error.what();
    }
    const bool told =
        write(ends[1], answer.data(), answer.size()) == static_cast<ssize_t>(answer.size());
    _exit(told ? 0 : 1);  // without the parent's exit handlers
  }
  close(ends[1]);
  std::string answer;
  char part[512];
  for (ssize_t got = 0; (got = read(ends[0], part, sizeof(part))) > 0;) {
    answer.append(part, static_cast<std::size_t>(got));
  }
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) {
    answer += " (the child ended with status " + std::to_string(status) + ")";
  }
  return answer;
}

void refuse(long call, int error, std::optional<RefusedArgument> argument) {
  const auto number = static_cast<std::uint32_t>(call);
  const auto answer = static_cast<std::uint32_t>(SECCOMP_RET_ERRNO | error);
  const RefusedArgument asked = argument.value_or(RefusedArgument{});
  const auto asked_at =
      static_cast<std::uint32_t>(offsetof(seccomp_data, args) + std::size_t{asked.position} * 8);
  const std::uint8_t unless_equal = argument ? 1 : 0;
  sock_filter filter[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, number, 0, 3),
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, asked_at),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, asked.value, 0, unless_equal),
      BPF_STMT(BPF_RET | BPF_K, answer),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  sock_fprog program{};
  program.len = std::size(filter);
  program.filter = filter;
  if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 ||
      prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) != 0) {
    throw std::system_error(errno, std::generic_category(), "seccomp");
  }
}

std::string open_error(const std::string& path, std::uint64_t bytes, const DeviceOptions& options) {
  try {
    open_device(path, bytes, options);
    return {};
  } catch (const std::exception& error) {
    return error.what();
  }
}

}  // namespace fc::testing
