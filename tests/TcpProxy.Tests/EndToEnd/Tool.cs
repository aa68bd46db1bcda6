using System;
using System.Collections.Generic;
using System.Diagnostics;
using System.IO;
using System.Linq;
using System.Threading.Tasks;
using Xunit;

namespace TcpProxy.Tests;

/// <summary>What a command left behind.</summary>
internal sealed record Outcome(int Status, string Out, string Err)
{
    public string[] ErrLines => Err.Split('\n', StringSplitOptions.RemoveEmptyEntries);

    /// <summary>The output, of a command that must have succeeded.</summary>
    public string Good()
    {
        Assert.True(Status == 0, $"exit status {Status}: {Err}{Out}");
        return Out;
    }
}

/// <summary>External programs: found or skipped, run to their end or kept for the time of a test.</summary>
internal static class Tool
{
    public static bool IsRoot => Environment.UserName == "root";

    /// <summary>The path of the program; the test is skipped where it is not installed.</summary>
    public static string Need(string program, string package)
    {
        string? found = Find(program);
        Assert.SkipWhen(found is null, $"{program} not found: apt-get install {package}");
        return found;
    }

    /// <summary>Whether the proxy runs without libc, as it does on Windows and macOS.</summary>
    public static bool IsPortable => Environment.GetEnvironmentVariable("TCPPROXY_PORTABLE") == "1";

    /// <summary>Files that the .NET runtime opens when it first needs them, and keeps.</summary>
    public static int LateFiles => IsPortable ? 12 : 0;

    public static void NeedLibc(string why) => Assert.SkipWhen(IsPortable, $"TCPPROXY_PORTABLE=1: {why}");

    public static void NeedRoot(string why) => Assert.SkipUnless(IsRoot, $"wants root: {why}");

    public static string? Find(string program, params string[] folders) =>
        (Environment.GetEnvironmentVariable("PATH") ?? string.Empty).Split(':')
            .Concat(["/usr/sbin", "/sbin"])
            .Concat(folders)
            .Select(f => Path.Combine(f, program))
            .FirstOrDefault(File.Exists);

    public static Task<Outcome> Proxy(params string[] arguments) => Run(ProxyProcess.Binary, arguments);

    public static Task<Outcome> Run(string program, params string[] arguments) => Run(program, arguments, 60);

    public static async Task<Outcome> Run(
        string program, string[] arguments, double seconds, string? folder = null, string? input = null)
    {
        ProcessStartInfo start = new(program, arguments)
        {
            RedirectStandardOutput = true,
            RedirectStandardError = true,
            RedirectStandardInput = true,
            WorkingDirectory = folder ?? Path.GetTempPath(),
        };
        using Process process = Process.Start(start)!;
        try
        {
            await process.StandardInput.WriteAsync(input ?? string.Empty);
            process.StandardInput.Close();
        }
        catch (IOException)
        {
            // a command that ends without reading its input is free to do so
        }

        Task<string> output = process.StandardOutput.ReadToEndAsync();
        Task<string> errors = process.StandardError.ReadToEndAsync();
        try
        {
            await Task.WhenAll(output, errors, process.WaitForExitAsync())
                .Within($"the end of {program} {string.Join(' ', arguments)}", seconds);
        }
        catch
        {
            process.Kill(entireProcessTree: true);
            throw;
        }

        return new Outcome(process.ExitCode, await output, await errors);
    }

    /// <summary>Starts a server that runs until the test ends.</summary>
    public static void Background(Given given, string program, params string[] arguments)
    {
        ProcessStartInfo start = new(program, arguments)
        {
            RedirectStandardOutput = true,
            RedirectStandardError = true,
            WorkingDirectory = given.Folder,
        };
        Process process = Process.Start(start)!;
        List<string> said = [];
        DataReceivedEventHandler keep = (_, e) =>
        {
            lock (said)
            {
                said.Add(e.Data ?? string.Empty);
            }
        };
        process.OutputDataReceived += keep;
        process.ErrorDataReceived += keep;
        process.BeginOutputReadLine();
        process.BeginErrorReadLine();
        given.AtEnd(async () =>
        {
            if (TestContext.Current.TestState?.Result == TestResult.Failed)
            {
                lock (said)
                {
                    TestContext.Current.TestOutputHelper?.WriteLine(
                        $"$ {program}\n{string.Join('\n', said.TakeLast(40))}");
                }
            }

            process.Kill(entireProcessTree: true);
            await process.WaitForExitAsync();
            process.Dispose();
        });
    }
}
