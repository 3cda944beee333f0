// What the tests of files that outlive a process share: a directory on tmpfs, mounts of their own,
// and children that are killed.
#pragma once

#include <gtest/gtest.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <stdexcept>
#include <string>

namespace fc::testing {

// A directory that goes away, on tmpfs unless another place is named.
class Folder {
 public:
  explicit Folder(const std::string& in = "/dev/shm") {
    path_ = in + "/fc-persist-XXXXXX";
    if (mkdtemp(path_.data()) == nullptr) throw std::runtime_error("mkdtemp " + path_);
  }
  ~Folder() { std::filesystem::remove_all(path_); }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;

  const std::string& path() const { return path_; }
  std::string file(const std::string& name = "cache") const { return path_ + "/" + name; }

 private:
  std::string path_;
};

// A mount that only this thread and what it starts see; it ends with them whatever happens. Needs
// root, as CI has.
class Mounted {
 public:
  Mounted(const char* type, const std::string& options) {
    if (unshare(CLONE_NEWNS) != 0 ||
        mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) != 0 ||
        mount("none", folder_.path().c_str(), type, 0, options.c_str()) != 0) {
      throw std::runtime_error("mount: run the tests as root, in a container with --privileged");
    }
  }
  ~Mounted() { umount2(folder_.path().c_str(), MNT_DETACH); }
  Mounted(const Mounted&) = delete;
  Mounted& operator=(const Mounted&) = delete;

  const std::string& path() const { return folder_.path(); }
  std::string file(const std::string& name = "cache") const { return folder_.file(name); }

 private:
  Folder folder_;
};

// A child process that does `work`, says that it is done and then waits for its end.
class Child {
 public:
  explicit Child(const std::function<void(int told)>& work) {
    int ends[2];
    if (pipe(ends) != 0) throw std::runtime_error("pipe");
    pid_ = fork();
    if (pid_ < 0) throw std::runtime_error("fork");
    if (pid_ == 0) {
      close(ends[0]);
      try {
        work(ends[1]);
        (void)!write(ends[1], "+", 1);
      } catch (const std::exception& error) {
        (void)!write(ends[1], error.what(), std::string(error.what()).size());
      }
      for (;;) pause();
    }
    close(ends[1]);
    from_ = ends[0];
  }
  ~Child() {
    kill_hard();
    close(from_);
  }
  Child(const Child&) = delete;
  Child& operator=(const Child&) = delete;

  pid_t pid() const { return pid_; }
  // Waits until the work is done.
  void expect_done() const {
    char said = 0;
    ASSERT_EQ(1, read(from_, &said, 1));
    ASSERT_EQ('+', said) << "the child failed";
  }
  // Waits for so many bytes of what it writes to its pipe.
  std::string first(std::size_t bytes) const {
    std::string all(bytes, '\0');
    std::size_t done = 0;
    for (ssize_t got = 0; done < bytes; done += static_cast<std::size_t>(got)) {
      if ((got = read(from_, all.data() + done, bytes - done)) <= 0) break;
    }
    all.resize(done);
    return all;
  }
  // What else it wrote: read it after its end, or it may never come.
  std::string rest() const {
    std::string all;
    char part[4096];
    for (ssize_t got = 0; (got = read(from_, part, sizeof(part))) > 0;) {
      all.append(part, static_cast<std::size_t>(got));
    }
    return all;
  }
  void kill_hard() {
    if (pid_ <= 0) return;
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
    pid_ = 0;
  }

 private:
  pid_t pid_ = 0;
  int from_ = -1;
};

// The message with which something fails; empty when it does not.
inline std::string error_of(const std::function<void()>& work) {
  try {
    work();
    return {};
  } catch (const std::exception& error) {
    return error.what();
  }
}

inline void write_file(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary | std::ios::trunc) << bytes;
}
inline std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

#define EXPECT_SAYS(error, part) EXPECT_NE(std::string::npos, (error).find(part)) << (error)

}  // namespace fc::testing
