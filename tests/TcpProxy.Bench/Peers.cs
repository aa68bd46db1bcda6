using System;
using System.Collections.Generic;
using System.Globalization;
using System.IO;
using System.Linq;

namespace TcpProxy.Bench;

/// <summary>A program under measurement: where it is, and how it is started between two ports.</summary>
internal sealed class Peer(string name, string path, Func<Route, string[]> command)
{
    internal string Name { get; } = name;
    internal string Path { get; } = path;
    internal string Version { get; init; } = "";
    internal string How { get; init; } = "";

    /// <summary>True for our own program and its other builds.</summary>
    internal bool Ours { get; init; }

    /// <summary>More connections than this are not asked of it.</summary>
    internal int MostConnections { get; init; } = int.MaxValue;

    /// <summary>The files that count as its size.</summary>
    internal string[] Files { get; init; } = [path];

    /// <summary>Writes its configuration, where it has one, and returns its command line.</summary>
    internal string[] Prepare(int listen, int backend, string folder) =>
        [Path, .. command(new Route(listen, backend, folder, Name))];
}

/// <summary>What a command line or a configuration is made from.</summary>
internal sealed record Route(int Listen, int Backend, string Folder, string Name)
{
    internal string Write(string text)
    {
        string file = System.IO.Path.Combine(Folder, Name + ".conf");
        File.WriteAllText(file, text);
        return file;
    }
}

/// <summary>
/// Finds the peers and configures each as its manual would for plain TCP: no access log, room for the
/// connections of the bench, one worker a CPU it may use, otherwise its defaults.
/// </summary>
internal static class Peers
{
    internal static readonly string[] Known = ["haproxy", "nginx", "rinetd", "socat"];

    internal static List<Peer> Find(Options options, Cpus cpus, int descriptors, string folder)
    {
        List<Peer> found = [];
        string? binary = Environment.GetEnvironmentVariable("TCPPROXY_BIN");
        if (string.IsNullOrEmpty(binary))
        {
            binary = Path.Combine(Options.Root(), "out", "tcpproxy");
        }
        if (File.Exists(binary))
        {
            found.Add(Ours("tcpproxy", binary, [], folder));
        }
        else
        {
            Program.Say($"tcpproxy: {binary} is not there; only its peers are measured");
        }
        foreach ((string name, string commandLine) in options.Also)
        {
            string[] words = commandLine.Split(' ', StringSplitOptions.RemoveEmptyEntries);
            found.Add(Ours(name, Path.GetFullPath(words[0]), words[1..], folder));
        }
        foreach (string name in Known.Where(options.Wants))
        {
            string? path = Which(name);
            Peer? peer = path is null ? null : Installed(name, path, cpus, descriptors, folder);
            if (peer is null)
            {
                Program.Say($"{name}: not installed{(path is null ? "" : " with what TCP needs")}, left out");
                continue;
            }
            found.Add(peer);
        }
        return found;
    }

    private static Peer Ours(string name, string path, string[] extra, string folder) => new(
        name,
        path,
        route => [$"127.0.0.1:{route.Listen}", $"127.0.0.1:{route.Backend}",
            "--log-file", Path.Combine(route.Folder, name + "-access.log"), .. extra])
    {
        Ours = true,
        Version = Line(Output([path, "--version"], folder), 0),
        How = string.Join(' ', ["one log line a connection, to a file", .. extra]),
    };

    private static Peer? Installed(string name, string path, Cpus cpus, int descriptors, string folder) =>
        name switch
        {
            "haproxy" => Haproxy(path, descriptors, folder),
            "nginx" => Nginx(path, cpus, descriptors, folder),
            "rinetd" => new Peer(name, path, Rinetd)
            {
                Version = Line(Output([path, "-v"], folder), 0),
                How = "no log; idle only to 1,000: its select() takes longer with each",
                MostConnections = 1000,
            },
            "socat" => new Peer(name, path, Socat)
            {
                Version = Line(Output([path, "-V"], folder), 1),
                How = "fork: one process a connection, 8 KB buffer, idle only to 1,000",
                MostConnections = 1000,
            },
            _ => null,
        };

    private static Peer Haproxy(string path, int descriptors, string folder)
    {
        int most = Math.Min(9500, (descriptors - 500) / 2);
        return new Peer("haproxy", path, route => ["-db", "-f", route.Write($$"""
            global
                maxconn {{most}}
            defaults
                mode tcp
                timeout connect 5s
                timeout client 1h
                timeout server 1h
            frontend f
                bind 127.0.0.1:{{route.Listen}}
                default_backend b
            backend b
                server s 127.0.0.1:{{route.Backend}}

            """)])
        {
            Version = Line(Output([path, "-v"], folder), 0).Split(" - ")[0],
            How = "mode tcp, threads auto, no log",
        };
    }

    private static Peer? Nginx(string path, Cpus cpus, int descriptors, string folder)
    {
        string build = Output([path, "-V"], folder);
        string[] flags = build.Split([' ', '\n'], StringSplitOptions.RemoveEmptyEntries);
        string? module = null;
        if (!flags.Contains("--with-stream"))
        {
            const string Flag = "--modules-path=";
            module = flags.Where(flag => flag.StartsWith(Flag, StringComparison.Ordinal))
                .Select(flag => flag[Flag.Length..])
                .Concat(["/usr/lib/nginx/modules", "/usr/lib64/nginx/modules"])
                .Select(modules => Path.Combine(modules, "ngx_stream_module.so"))
                .FirstOrDefault(File.Exists);
            if (module is null)
            {
                return null;
            }
        }
        string head = module is null ? "" : $"load_module {module};\n";
        string user = Libc.geteuid() == 0 ? "user root;\n" : "";
        return new Peer("nginx", path, route => ["-p", route.Folder + "/", "-c", route.Write($$"""
            {{head}}{{user}}daemon off;
            worker_processes {{cpus.Proxy.Length}};
            worker_rlimit_nofile {{descriptors}};
            error_log {{route.Folder}}/nginx-error.log crit;
            pid {{route.Folder}}/nginx.pid;
            events { worker_connections {{Math.Min(20000, descriptors - 100)}}; }
            stream {
                access_log off;
                server {
                    listen 127.0.0.1:{{route.Listen}} backlog=4096;
                    proxy_pass 127.0.0.1:{{route.Backend}};
                }
            }

            """), "-e", route.Folder + "/nginx-error.log"])
        {
            Version = Line(build, 0).Replace("nginx version: ", "", StringComparison.Ordinal),
            How = $"stream, {cpus.Proxy.Length} worker(s), no access log",
            Files = module is null ? [path] : [path, module],
        };
    }

    private static string[] Rinetd(Route route) => ["-f", "-c", route.Write($"""
        pidlogfile {route.Folder}/rinetd.pid
        127.0.0.1 {route.Listen} 127.0.0.1 {route.Backend}

        """)];

    private static string[] Socat(Route route) =>
    [
        $"TCP-LISTEN:{route.Listen},bind=127.0.0.1,reuseaddr,fork,backlog=4096",
        $"TCP:127.0.0.1:{route.Backend}",
    ];

    private static string? Which(string name) =>
        (Environment.GetEnvironmentVariable("PATH") ?? "").Split(':')
            .Concat(["/usr/sbin", "/usr/local/sbin", "/sbin"]) // not in every user's PATH
            .Where(folder => folder.StartsWith('/'))
            .Select(folder => Path.Combine(folder, name))
            .FirstOrDefault(File.Exists);

    /// <summary>What a short-lived program prints.</summary>
    private static string Output(string[] arguments, string folder)
    {
        string file = Path.Combine(folder, Guid.NewGuid().ToString("N", CultureInfo.InvariantCulture));
        int id = Libc.Spawn(arguments, file);
        for (int i = 0; i < 500 && !Libc.Reap(id, wait: false); i++)
        {
            if (i == 499)
            {
                _ = Libc.kill(id, Libc.SigKill);
                _ = Libc.Reap(id, wait: true);
            }
            _ = Libc.usleep(10_000);
        }
        return File.ReadAllText(file);
    }

    private static string Line(string text, int index) =>
        text.Split('\n').ElementAtOrDefault(index)?.Trim() ?? "";
}
